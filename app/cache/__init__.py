"""The cache room: what makes two answers the same, and the recordings of answers given, kept in Redis."""

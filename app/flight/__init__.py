"""One generation per key: who leads, who follows, in this process and across all that share a Redis."""

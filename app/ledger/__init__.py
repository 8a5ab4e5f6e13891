"""The usage ledger: one durable record per call, what it used and cost. It knows neither HTTP nor the engine."""

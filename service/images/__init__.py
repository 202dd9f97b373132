"""Pictures that clients send: fetched, measured and decoded."""

"""Stored responses: bounded, in memory or in one SQLite file.  Knows nothing of HTTP, models or what they say."""

"""Sans-IO wire machines and messages: bytes in, events out. Time is an argument, never read."""

"""The server role: holds a span of blocks and runs it for others."""

"""Byte-stream transports behind one interface: TCP and in-memory."""

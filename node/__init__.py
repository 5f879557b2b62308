"""The asyncio layer: sockets, threads, files and tasks live here and only here."""

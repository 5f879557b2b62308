"""The client role: plans chains of servers, generates, repairs."""

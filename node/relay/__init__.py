"""Circuit relay v2: being reached through others, and passing others' connections on."""

"""The engine performs what the state machines decide; the controller keeps them supplied."""

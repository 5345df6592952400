"""Which models are in memory: a state machine that is told what happens and says what to do."""

"""The checks of `modeldepot doctor`: each asks one thing of this machine and says what it found.

`examine` runs them all. Rules: a check changes nothing that it does not put back; it may block, for
ever too (a mount that hangs), because nobody waits for it longer than the limit; what it asks is passed
in where a test could not arrange it. No framework is imported here: `probing` asks another process.
"""

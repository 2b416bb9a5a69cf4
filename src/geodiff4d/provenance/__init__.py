"""Content credentials: what is made says, signed, that it was made, by what, and with whose consent."""

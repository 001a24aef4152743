"""How fast the attention is, against dense attention."""

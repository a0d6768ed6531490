"""How bytes move between ranks: a protocol, collectives, symmetric memory, message buffers."""

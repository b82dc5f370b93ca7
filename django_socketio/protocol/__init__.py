"""The two wire protocols, pure: no clock, no sockets, no framework. Bytes in, values out."""

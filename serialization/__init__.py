"""Bytes and numbers: messages, safetensors, streams, the exact fold. No sockets, no clock, no disk policy."""

"""Atomic writes, JSON lines and a strict safetensors reader."""

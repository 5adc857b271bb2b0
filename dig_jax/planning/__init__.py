"""--mode=plan: memory and time of a config on chips that need not be present."""

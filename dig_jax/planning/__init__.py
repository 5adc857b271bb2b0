"""--mode=plan: what a config costs on chips that need not be present."""

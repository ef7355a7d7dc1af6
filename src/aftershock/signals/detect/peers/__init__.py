"""Other people's rules as adapters for comparison, with their defaults and their defects. Never used by ours."""

"""Which zeros a network gets: scores, allocation and reconstruction put together, once or step by step."""

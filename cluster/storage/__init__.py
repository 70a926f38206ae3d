"""The storage node around the consensus core: its engine, and its shell under asyncio."""

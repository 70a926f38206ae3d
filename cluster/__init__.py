"""What is true of TimeTier without Ray: routing, consensus, engine, blocks, messages, carriers, client."""

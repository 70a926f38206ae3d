"""The pure consensus core: one Paxos log per timeline, no leader, no lease, no I/O of its own."""

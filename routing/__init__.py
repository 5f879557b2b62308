"""Pure routing decisions: Kademlia, swarm views, planning, repair. They take `now` and `rng`."""

"""Many replicas of the engine behind one front, on Ray Serve. Only here is ray imported, and only by few modules."""

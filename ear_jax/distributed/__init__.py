"""Devices and processes: mesh, sharding rules, joining a job, stopping it, noticing that it hangs."""

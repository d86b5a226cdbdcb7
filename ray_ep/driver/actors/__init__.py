"""What the driver has on the cluster: rank actors, their places, heartbeat and links. Decides no step."""

"""What illava does not break: ways to generate, faults, odd inputs."""

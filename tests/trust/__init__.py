"""What a patched model must stand: faults, threads, neighbours, odd inputs, every way to generate."""

"""What the rendered city is made of: canvases, houses, streets, and the ray caster."""

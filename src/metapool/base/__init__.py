"""What everything else stands on: errors, settings and store, images, functional networks."""

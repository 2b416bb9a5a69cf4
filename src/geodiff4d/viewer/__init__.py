"""An avatar in the browser: rendered here, steered there."""

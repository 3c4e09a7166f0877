"""What trains, judges and serves Clip-Phi; the model itself is the package modeling_clip_phi."""

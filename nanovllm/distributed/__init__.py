"""Several ranks: the group through which layers talk, how ranks are connected, started, told and ended."""

"""`nanovllm models` lists the families of models that the engine runs."""


def models() -> None:
    """List the families of models that the engine runs, by the name in config.json's `architectures`."""
    from nanovllm.models.__main__ import main  # which loads torch

    main()

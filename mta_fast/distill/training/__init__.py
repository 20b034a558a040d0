"""The training itself: arguments, the wrapped module, the trainer, what it saves and how a run goes on."""

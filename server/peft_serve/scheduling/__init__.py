"""Who runs next: slots, blocks, policy, scheduler. Plain Python; this package never imports torch."""

"""From what was measured to a learning rate: pure functions of plain numbers."""

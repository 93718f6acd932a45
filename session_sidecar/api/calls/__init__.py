"""The handlers of the calls: each takes what was asked and renders what `sessions` or `turns` say."""

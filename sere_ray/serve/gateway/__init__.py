"""What a request passes before an engine sees it: keys, limits, errors, control API, page."""

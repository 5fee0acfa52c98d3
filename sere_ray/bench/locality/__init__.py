"""`sere-ray bench locality`: what placing requests by their experts saves, simulated"""

"""Tags in prompts: only the first prompt's count, and networks without a tag are activated too."""

import re

registry = {}


class ExtraNetworkParams:
    def __init__(self, items):
        self.items = items


class ExtraNetwork:
    def __init__(self, name):
        self.name = name


def initialize():
    registry.clear()


def register_extra_network(network):
    registry[network.name] = network


def parse_prompts(prompts):
    cleaned, first = [], None
    for prompt in prompts:
        found = {}
        for name, given in re.findall(r"<(\w+):([^>]+)>", prompt):
            found.setdefault(name, []).append(ExtraNetworkParams(given.split(":")))
        first = found if first is None else first
        cleaned.append(re.sub(r"<(\w+):([^>]+)>", "", prompt))
    return cleaned, first


def activate(p, data):
    for name, network in registry.items():
        network.activate(p, data.get(name, []))


def deactivate(p, data):
    for network in registry.values():
        network.deactivate(p)

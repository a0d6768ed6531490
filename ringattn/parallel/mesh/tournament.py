"""In which order ranks meet in pairs: every pair once, in rounds of pairs that share nobody. Pure."""


def opponents(player: int, players: int) -> list[int]:
    """The others in the order of a round-robin tournament: in each round everybody meets at most one.

    The circle method: with an odd number of players one rests in every round.
    """
    seats = players + players % 2
    if seats < 2:
        return []
    found = []
    for turn in range(seats - 1):
        if player == seats - 1:
            other = turn * (seats // 2) % (seats - 1)
        else:
            other = (turn - player) % (seats - 1)
            other = seats - 1 if other == player else other
        if other < players:
            found.append(other)
    return found

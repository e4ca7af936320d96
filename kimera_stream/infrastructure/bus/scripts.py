"""Names of keys in Redis, and the few scripts that make several steps one.

| key | holds |
| --- | --- |
| ``work:P`` | stream: the work of partition P that is not done (done work is deleted, so its length is the depth) |
| ``full:P`` | hash: by node and bucket of principals, the volley of its work that P was too full for |
| ``share:P`` | hash: by principal, how much of ``work:P`` is theirs |
| ``topic:T`` | stream: the last messages of topic T, each with its number ``n`` |
| ``number:T`` | hash: ``n``, the number of the last message of T (it begins with the time in microseconds, so after a flush it never goes on
  where it was), and ``items`` and ``bytes`` since T was last trimmed |
| ``shared:NODE`` | hash: what NODE shares |
| ``born`` | when Redis was first used since it last lost its data |
| ``probe`` | nothing: written to find out whether one can write |
| ``nodes`` | sorted set: nodes that share something, by the time at which they are forgotten |
"""

from typing import Final

GROUP: Final = "engines"
"""The consumer group of every partition."""
TOPIC_EXPIRY: Final = 60_000
"""Milliseconds after which a topic of one node (``reply:N``) that nobody uses is gone."""


class Keys:
    """Names of keys.

    Args:
        prefix: Begins each.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.nodes = f"{prefix}nodes"
        self.born = f"{prefix}born"
        self.probe = f"{prefix}probe"

    def work(self, partition: int) -> str:
        return f"{self._prefix}work:{partition}"

    def full(self, partition: int) -> str:
        return f"{self._prefix}full:{partition}"

    def share(self, partition: int) -> str:
        return f"{self._prefix}share:{partition}"

    def topic(self, topic: str) -> str:
        return f"{self._prefix}topic:{topic}"

    def number(self, topic: str) -> str:
        return f"{self._prefix}number:{topic}"

    def shared(self, node: str) -> str:
        return f"{self._prefix}shared:{node}"


def expiry_of(topic: str) -> int:
    """Milliseconds of quiet after which a topic's stream may go; 0: never."""
    return TOPIC_EXPIRY if ":" in topic else 0


ADD: Final = """
local sender = ARGV[3] .. ':' .. ARGV[6]
if redis.call('HGET', KEYS[2], sender) == ARGV[5] then return false end
local held, most, own = redis.call('XLEN', KEYS[1]), tonumber(ARGV[1]), 0
if ARGV[7] ~= '' then
  if held == 0 then redis.call('DEL', KEYS[3]) end
  own = tonumber(redis.call('HGET', KEYS[3], ARGV[7]) or 0)
end
if held + own >= most then
  redis.call('HSET', KEYS[2], sender, ARGV[5])
  redis.call('PEXPIRE', KEYS[2], 60000)
  return false
end
if ARGV[7] ~= '' then redis.call('HINCRBY', KEYS[3], ARGV[7], 1) end
return redis.call('XADD', KEYS[1], '*', 'r', ARGV[2], 't', ARGV[3], 'd', ARGV[4], 'o', ARGV[7])
"""
"""KEYS: work, full, share. ARGV: most entries, request, reply_to, payload, volley, bucket, principal or empty. Nil when full.

Full is, for a principal, what has no more room than they hold already: whoever holds most always leaves as much for others.

A volley is what a node adds for a bucket of principals until it hears that the partition was full for it: once some of it was refused, all
that follows is, so that nothing is there without what was added before it. A lane is of one principal; of other buckets nothing is refused."""

DONE: Final = f"""
local gone = 0
for i = 1, #ARGV, 2 do
  redis.call('XACK', KEYS[1], '{GROUP}', ARGV[i])
  if redis.call('XDEL', KEYS[1], ARGV[i]) == 1 then
    gone = gone + 1
    if ARGV[i + 1] ~= '' and redis.call('HINCRBY', KEYS[2], ARGV[i + 1], -1) <= 0 then
      redis.call('HDEL', KEYS[2], ARGV[i + 1])
    end
  end
end
return gone
"""
"""KEYS: work, share. ARGV: id and principal or empty, of each. XACK of a group that is gone is no error."""

TIDY: Final = f"""
local gone = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], '{GROUP}')) do
  local of = {{}}
  for i = 1, #consumer, 2 do of[consumer[i]] = consumer[i + 1] end
  if of['pending'] == 0 and of['name'] ~= ARGV[1] and of['idle'] >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], '{GROUP}', of['name'])
    gone = gone + 1
  end
end
return gone
"""
"""KEYS: work. ARGV: this consumer, idle in ms. Forgets consumers that have nothing and have been away: every run of a node is another one."""

PUBLISH: Final = """
if redis.call('EXISTS', KEYS[2]) == 0 then
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[2], 'n', string.format('%d%06d', now[1], now[2]))
end
local n = string.format('%.0f', redis.call('HINCRBY', KEYS[2], 'n', 1))
redis.call('XADD', KEYS[1], '*', 'n', n, 'd', ARGV[4])
local items = redis.call('HINCRBY', KEYS[2], 'items', 1)
local bytes = redis.call('HINCRBY', KEYS[2], 'bytes', #ARGV[4] + 64)
if items * 2 >= tonumber(ARGV[1]) or bytes * 2 >= tonumber(ARGV[2]) then
  redis.call('XTRIM', KEYS[1], 'MAXLEN', items)
  redis.call('HSET', KEYS[2], 'items', 0, 'bytes', 0)
end
if ARGV[3] ~= '0' then
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
end
return n
"""
"""KEYS: topic, number. ARGV: most entries, most bytes, expiry in ms or 0, payload.

Trimmed by halves: ``items`` and ``bytes`` count what came since the last trimming, and once that is half of what may be, all before it goes.
So at least half of the bound is kept, and never more than all of it (and one message)."""

HOLE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'n', string.format('%d%06d', now[1], now[2]))
end
if ARGV[1] ~= '0' then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
return redis.call('HINCRBY', KEYS[1], 'n', 1)
"""
"""KEYS: number. ARGV: expiry in ms or 0. A number that no message has: followers see that one is missing."""

PLACE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[1], string.format('%d%06d', now[1], now[2]))
end
local places = {redis.call('GET', KEYS[1])}
for i = 2, #KEYS, 2 do
  local last = redis.call('XREVRANGE', KEYS[i], '+', '-', 'COUNT', 1)
  local id, expiry = ARGV[i - 1], ARGV[i]
  local more = 0
  if id ~= '' and #redis.call('XRANGE', KEYS[i], '(' .. id, '+', 'COUNT', 1) > 0 then more = 1 end
  places[#places + 1] = {last[1] and last[1][1] or '0-0', redis.call('HGET', KEYS[i + 1], 'n'), more}
  if expiry ~= '0' then
    redis.call('PEXPIRE', KEYS[i], expiry)
    redis.call('PEXPIRE', KEYS[i + 1], expiry)
  end
end
return places
"""
"""KEYS: born, then per topic: topic, number. ARGV per topic: id read last or empty, expiry in ms or 0.

When the data was born, then per topic: last id, number (nil: nothing was ever said), whether there is more to read."""

TOUCH: Final = """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return redis.call('HLEN', KEYS[2])
"""
"""KEYS: nodes, shared. ARGV: node, expiry in ms. How many values are there."""

GATHER: Final = """
local now = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now[1] * 1000 + math.floor(now[2] / 1000))
local found = {}
for _, node in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local value = redis.call('HGET', ARGV[1] .. node, ARGV[2])
  if value then
    found[#found + 1] = node
    found[#found + 1] = value
  end
end
return found
"""
"""KEYS: nodes. ARGV: begin of the keys of shared values, field. node, value, ..."""

// Bun's native publish (uWebSockets) for bench/fanout.py; speaks as fanout_server.c does. Run with `bun bench/fanout_bun.js`.
const PAD = "x".repeat(400);
const EVENT_BYTES = 200;
const BACKLOG = 65536; // bytes that one connection may have waiting before the next tick waits for it
const sockets = new Set();

const server = Bun.serve({
  port: 0,
  hostname: "0.0.0.0",
  fetch(request, server) {
    if (server.upgrade(request)) return undefined;
    return new Response("not a WebSocket handshake", { status: 426 });
  },
  websocket: {
    perMessageDeflate: false,
    idleTimeout: 0,
    sendPings: false,
    backpressureLimit: 1 << 28, // nothing may be dropped: the checker would say so
    open(ws) {
      ws.subscribe("geoids");
      sockets.add(ws);
    },
    close(ws) {
      sockets.delete(ws);
    },
    message() {},
  },
});
console.log(server.port);

function event(offset) {
  const head = `{"op":"event","channel":"geoids","epoch":"bench","offset":${offset},"type":"geoid.created","ts":1700000000000,"data":{"t":${process.hrtime.bigint()},"pad":"`;
  return `${head}${PAD.slice(0, Math.max(0, EVENT_BYTES - 3 - head.length))}"}}`;
}

function cpu() {
  const used = process.cpuUsage();
  return (used.user + used.system) / 1e6;
}

const breathe = () => new Promise((resolve) => setImmediate(resolve));
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const now = () => performance.now() / 1000;

async function push(batch, seconds, rate, offset) {
  const begun = now();
  const used = cpu();
  let events = 0;
  while (now() - begun < seconds) {
    if (rate > 0) {
      const wait = events / rate - (now() - begun);
      if (wait > 0) await sleep(wait * 1000);
    }
    for (let i = 0; i < batch; i++) server.publish("geoids", event(offset++));
    events += batch;
    await breathe();
    if (rate === 0) {
      for (const ws of sockets) while (ws.getBufferedAmount() > BACKLOG) await breathe();
    }
  }
  console.log(JSON.stringify({ events, seconds: now() - begun, cpu: cpu() - used, last: offset - 1 }));
}

for await (const line of console) {
  const [, batch, seconds, rate, offset] = line.split(" ").map(Number);
  await push(batch, seconds, rate, offset);
}

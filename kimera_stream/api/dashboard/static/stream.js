// One WebSocket that is kept alive: reconnects with backoff and jitter, resumes each channel where it stopped.

const FIRST_DELAY = 300;
const LONGEST_DELAY = 10_000;
const REPLY_TIMEOUT = 30_000;

export class Stream {
  // handlers: state(state, text), event(event), gap(channel), resync(message), position(epoch, offset), token()
  constructor(url, channels, handlers) {
    this.url = url;
    this.handlers = handlers;
    this.channels = new Map(channels.map((channel) => [channel.channel, { ...channel, position: null }]));
    this.token = null;
    this.socket = null;
    this.attempt = 0;
    this.nextId = 1;
    this.pending = new Map();
    this.timer = null;
    this.ready = false;
  }

  start(token) {
    this.token = token || null;
    this.stop();
    this.attempt = 0;
    this.#open();
  }

  stop() {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.socket = null;
    this.ready = false;
    if (socket) {
      socket.onclose = socket.onmessage = socket.onerror = null;
      socket.close(1000);
    }
    this.#failPending("the connection was closed");
  }

  // Sends a command and resolves with its reply; rejects with the server's error.
  call(op, fields = {}) {
    if (!this.ready && op !== "connect") return Promise.reject(new Error("not connected"));
    const id = this.nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.pending.delete(id);
        reject(new Error("no reply in time"));
      }, REPLY_TIMEOUT);
      this.pending.set(id, { resolve, reject, timer });
      this.socket.send(JSON.stringify({ op, id, ...fields }));
    });
  }

  #open() {
    this.handlers.state("connecting", "connecting");
    const socket = new WebSocket(this.url, ["kimera.v1.json"]);
    this.socket = socket;
    socket.onopen = () => this.#introduce(socket);
    socket.onmessage = (message) => {
      if (socket === this.socket) this.#receive(JSON.parse(message.data));
    };
    socket.onclose = (event) => {
      if (socket === this.socket) this.#closed(event.code, event.reason);
    };
  }

  async #introduce(socket) {
    const subs = [...this.channels.values()].map((channel) => {
      const body = { channel: channel.channel };
      if (channel.latest) return body;
      if (channel.position) body.since = channel.position;
      else if (channel.rewind) body.rewind = channel.rewind;
      return body;
    });
    try {
      const connected = await this.call("connect", {
        ...(this.token ? { token: this.token } : {}),
        client: { name: "dashboard" },
        subs,
      });
      if (socket !== this.socket) return;
      this.ready = true;
      this.steady = setTimeout(() => { this.attempt = 0; }, 5000);
      for (const sub of connected.subs ?? []) {
        const channel = this.channels.get(sub.channel);
        if (!channel || sub.op !== "subscribed") continue;
        if (channel.position && !channel.latest && !sub.recovered) {
          channel.position = { epoch: sub.epoch, offset: sub.offset };
          this.handlers.gap(sub.channel);
        } else if (!channel.position && !channel.rewind) {
          channel.position = { epoch: sub.epoch, offset: sub.offset };
        }
      }
      this.handlers.position(connected.epoch, connected.offset);
      this.handlers.state("connected", `live · ${connected.server.version}`);
    } catch (error) {
      if (socket === this.socket && (error.code === "unauthorized" || error.code === "forbidden")) this.#refused(error.message);
    }
  }

  #receive(message) {
    if (message.op === "event") {
      const channel = this.channels.get(message.channel);
      if (channel && !channel.latest) {
        const seen = channel.position;
        if (seen && channel.counted && seen.epoch === message.epoch && message.offset <= seen.offset) return;
        channel.position = { epoch: message.epoch, offset: message.offset };
        channel.counted = true;
        this.handlers.position(message.epoch, message.offset);
      }
      this.handlers.event(message);
    } else if (message.op === "heartbeat") {
      this.handlers.position(message.epoch, message.offset);
    } else if (message.op === "resync") {
      this.handlers.resync(message);
    } else if (this.pending.has(message.id)) {
      const { resolve, reject, timer } = this.pending.get(message.id);
      clearTimeout(timer);
      this.pending.delete(message.id);
      if (message.op === "error") reject(Object.assign(new Error(message.message), { code: message.code }));
      else resolve(message);
    }
  }

  #closed(code, reason) {
    this.ready = false;
    this.socket = null;
    clearTimeout(this.steady);
    this.#failPending("the connection was lost");
    if (code >= 4500) {
      if (code === 4500 || code === 4502) this.#refused(reason || "a token is needed");
      else this.handlers.state("ended", `closed by the server: ${reason || code}`);
      return;
    }
    const ceiling = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** this.attempt);
    const delay = ceiling * (0.5 + Math.random() / 2);
    this.attempt += 1;
    this.handlers.state("waiting", `connection lost${reason ? ` (${reason})` : ""}, again in ${(delay / 1000).toFixed(1)} s`);
    this.timer = setTimeout(() => this.#open(), delay);
  }

  #refused(reason) {
    this.stop();
    this.handlers.state("ended", reason);
    this.handlers.token();
  }

  #failPending(reason) {
    for (const { reject, timer } of this.pending.values()) {
      clearTimeout(timer);
      reject(new Error(reason));
    }
    this.pending.clear();
  }
}

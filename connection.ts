/**
 * A Bun socket as a stream of frames that a program can await in both directions. Server and client both stand on it.
 *
 * Reading: `next()` gives one frame at a time; while nobody asks, the socket is paused, so a peer that sends without
 * being heard costs one chunk. Writing: `send()` collects small frames and writes when they are many or when `next()`
 * is about to wait, and where they are many it returns only when the kernel has taken them, so a peer that does not read
 * costs one chunk as well. Every wait ends after `timeoutMs` without a byte.
 *
 * Two short cuts around the user's memory serve plain TCP where the C library can be had: `sendFile` is sendfile(2),
 * and the rest of a large frame is received straight into its place. With TLS all goes through Bun.
 *
 * A server's TLS begins where a plain connection was accepted, with what certificate there is at that moment. So a new
 * one needs no new listener, and nobody who waits to be accepted is lost with an old one.
 */

import { readSync } from "node:fs";
import type { Socket as BunSocket, SocketHandler, TCPSocketListener, TCPSocketListenOptions } from "bun";
import { Errno, libc } from "./libc.ts";
import { type BufferPool, type Frame, FrameDecoder, quote, RepriseError } from "./protocol.ts";

/** Small frames are collected up to this many bytes. */
const MAX_COLLECTED_BYTES = 64 * 1024;
/** From this many bytes on, a write of its own costs less than a copy. */
const MIN_UNCOPIED_BYTES = 128 * 1024;
/** From this many outstanding bytes of one frame on, receiving them directly is worth a system call of its own. */
const MIN_DIRECT_BYTES = 16 * 1024;
/** Signals, timers and other connections get their turn after this many bytes, or milliseconds. */
const TURN_BYTES = 4 * 1024 * 1024;
const TURN_MS = 10;
/** Chunks grow or shrink until one takes the connection about this long. */
const FIRST_CHUNK_BYTES = 64 * 1024;
const SHORT_CHUNK_MS = 5;
const LONG_CHUNK_MS = 100;
/** A wait may end so much late, so that thousands that end one after the other are not looked through for each. */
const ALARM_STEP_MS = 10;
/** How long `finish` waits for the peer to have read everything. */
const FINISH_MS = 5_000;
/** The number of TLS 1.2 on the wire; 1.3 is spoken as well. */
const LEAST_TLS = 0x0303;

/** Bun's sockets have their descriptor, its types do not say so. */
type Socket<T> = BunSocket<T> & { readonly fd: number };

export interface ConnectionOptions {
  /** Longest frame to accept, in bytes of payload. */
  maxLength: number;
  /** Where the memory for large frames comes from: see FrameDecoder. */
  pool?: BufferPool;
  /** Every wait for the peer ends after this long without a byte. */
  timeoutMs: number;
  /** Each frame must have come whole within `timeoutMs`, for peers that have no reason to send slowly. */
  promptFrames?: boolean;
  /**
   * Bytes a second that a peer must at least send or take while it is waited for, on the average of `timeoutMs`. Where it
   * is given, 0 too, one that takes them is not silent.
   */
  minRate?: number;
  /** TLS goes over the socket. */
  encrypted?: boolean;
  /** In the middle of a large frame the process waits this long, in milliseconds, before others get their turn. */
  directWaitMs?: number;
}

/** Who may leave a connection to itself: see `rest`. */
export interface Sleeper {
  run(): void;
}

export class Connection {
  readonly #socket: Socket<Connection>;
  /** Its address; "" when it has gone before that could be asked for. */
  readonly peer: string;
  readonly #decoder: FrameDecoder;
  readonly #encrypted: boolean;
  readonly #minRate: number | undefined;
  /** Every wait for the peer ends after this long without a byte. */
  timeoutMs: number;
  /** Who gives memory for large frames expects them. */
  readonly #direct: boolean;
  readonly #directWaitMs: number;
  /** Who is called when there is something to read. */
  #sleeper: Sleeper | undefined;
  readonly #readable = new Waiter();
  readonly #writable = new Waiter();
  #chunks: Uint8Array[] = [];
  #collected: Uint8Array[] = [];
  #collectedBytes = 0;
  #paused = false;
  /** No more input comes: an end in order, or `#cut`. */
  #ended = false;
  #cut: RepriseError | undefined;
  /** Nothing can be written any more. */
  #closed = false;
  /** Set from our side: overrides everything, also input that has come. */
  #failure: RepriseError | undefined;
  /** A server's TLS handshake is not over: nothing can be said yet. */
  isShaking = false;
  /** The last frame was a large one, and the next may be expected to be. */
  #streaming = false;
  #flushing: Promise<void> | undefined;
  #flushIsDue = false;
  /** When bytes last came and went. */
  #readAt = 0;
  #wroteAt = 0;
  /** Bytes since others had their turn, and when that was. */
  #turn = 0;
  #turnAt = performance.now();
  /** Bytes that came, and those that the kernel took to send. */
  #received = 0;
  #written = 0;
  /** Since the peer was last found to be fast enough: how long it was waited for, and what had moved until then. */
  #waitedMs = 0;
  #movedBefore = 0;
  /** More must come from the peer, also between two frames: it is in the middle of something. What we say is no excuse. */
  owes = false;
  /** Each frame must have come whole within `timeoutMs`. */
  promptFrames: boolean;
  readonly #openedAt = performance.now();
  /** Called when `next()` has used up what came, before it waits for more: the moment for what was put off. */
  beforeWait: (() => Promise<void>) | undefined;

  constructor(socket: BunSocket<Connection>, options: ConnectionOptions) {
    this.#socket = socket as Socket<Connection>;
    this.peer = socket.remoteAddress ?? "";
    this.#decoder = new FrameDecoder(options);
    this.timeoutMs = options.timeoutMs;
    this.promptFrames = options.promptFrames ?? false;
    this.#minRate = options.minRate;
    this.#encrypted = options.encrypted ?? false;
    this.#direct = options.pool !== undefined && !this.#encrypted;
    this.#directWaitMs = options.directWaitMs ?? 0;
    socket.data = this;
  }

  /** Longest frame to accept from now on, in bytes of payload. */
  set maxLength(bytes: number) {
    this.#decoder.maxLength = bytes;
  }

  /** A frame that is here already, without waiting for any. Throws as `next`. */
  ready(): Frame | undefined {
    for (;;) {
      if (this.#failure) throw this.#failure;
      const frame = this.#decoder.next();
      if (frame) this.#streaming = frame.payload.length >= MIN_DIRECT_BYTES;
      if (frame || this.#chunks.length === 0) return frame;
      this.#decoder.push(this.#chunks.shift()!);
    }
  }

  /** The next frame, or undefined when the peer has ended the stream between two frames. Throws `lost`, `bad_frame`. */
  async next(): Promise<Frame | undefined> {
    const startedAt = this.promptFrames ? (this.owes ? this.#openedAt : performance.now()) : undefined;
    for (;;) {
      if (this.#failure) throw this.#failure;
      const frame = this.#decoder.next();
      if (frame) {
        this.#streaming = frame.payload.length >= MIN_DIRECT_BYTES;
        return frame;
      }
      const chunk = this.#chunks.shift();
      if (chunk) this.#decoder.push(chunk);
      else if (this.#ended) return this.#atEnd();
      else if (!this.#receive()) await this.#untilReadable(startedAt);
      else if (this.#turnIsOver()) await nextTurn();
    }
  }

  /**
   * Where all that came is used up: true, and `sleeper.run()` is called when there is more to do, be it that the time is
   * over or that `fail` was called, which `next()` then throws. Thousands of clients idle: a function that waits for each
   * would cost more than all that is kept of it.
   */
  rest(sleeper: Sleeper): boolean {
    if (this.#chunks.length > 0 || this.#ended || this.#failure) return false;
    if (!this.#decoder.atBoundary || this.beforeWait) return false;
    this.#sendCollected();
    this.#unpause();
    this.#sleeper = sleeper;
    this.#readable.rest(this, performance.now() + this.timeoutMs);
    return true;
  }

  /** The end of a rest, unless the peer took bytes meanwhile. */
  wakeUp(inTime: boolean): void {
    const dueAt = this.#wroteAt + this.timeoutMs;
    if (!inTime && dueAt > performance.now()) {
      this.#readable.rest(this, dueAt);
      return;
    }
    const sleeper = this.#sleeper;
    this.#sleeper = undefined;
    this.#turnAt = performance.now();
    this.#forgive();
    if (!inTime) this.fail(this.#silence());
    sleeper?.run();
  }

  /**
   * Sends bytes, at the latest when `next()` is about to wait. The caller gives them away, and waits while much is under
   * way. One party may send while another reads.
   */
  async send(bytes: Uint8Array): Promise<void> {
    if (this.collect(bytes)) await this.flush();
  }

  /** The same without waiting: true tells that it is time to `flush`. */
  collect(bytes: Uint8Array): boolean {
    this.#collected.push(bytes);
    this.#collectedBytes += bytes.length;
    if (this.#collectedBytes >= MAX_COLLECTED_BYTES) return true;
    if (this.#readable.isWaiting) this.#flushSoon();
    return false;
  }

  /** While the other party of ours waits in `next()`, nobody would. */
  #flushSoon(): void {
    if (this.#flushIsDue) return;
    this.#flushIsDue = true;
    setImmediate(() => {
      this.#flushIsDue = false;
      this.flush().catch((error) => this.fail(error));
    });
  }

  /** Returns when the kernel has taken all that was sent. */
  async flush(): Promise<void> {
    while (this.#collectedBytes > 0 || this.#flushing) {
      this.#flushing ??= this.#writeCollected().finally(() => {
        this.#flushing = undefined;
      });
      await this.#flushing;
    }
  }

  async #writeCollected(): Promise<void> {
    this.#checkWritable();
    const all = together(this.#collected);
    this.#collected = [];
    this.#collectedBytes = 0;
    for (const bytes of all) {
      for (let at = 0; at < bytes.length; ) {
        const taken = this.#write(at === 0 ? bytes : bytes.subarray(at));
        at += taken;
        if (at < bytes.length) await this.#untilWritable();
      }
    }
    if (this.#turnIsOver()) await nextTurn();
  }

  /** Whether `sendFile` works here. */
  get canSendFile(): boolean {
    return !this.#encrypted && libc() !== null;
  }

  /**
   * Sends `length` bytes of a file from `offset` on, from page cache to socket. A file that ends early leaves the frame
   * cut: this throws `changed`, or `failed` for a read error, and the connection can only be closed.
   */
  async sendFile(file: number, offset: number, length: number): Promise<void> {
    await this.flush();
    const end = offset + length;
    while (offset < end) {
      this.#checkWritable();
      const sent = libc()!.sendfile(this.#socket.fd, file, offset, end - offset);
      if (sent > 0) {
        this.#wrote(sent);
        offset += sent;
      } else if (sent === 0) {
        throw new RepriseError("changed", "changed on the server: the file became shorter");
      } else if (sent === -Errno.EAGAIN) {
        // Bun arms `drain` only for a write of its own that was cut short: let it try one byte.
        offset += await this.#sendCopied(file, offset, 1);
      } else if (sent === -Errno.EINVAL || sent === -Errno.EOPNOTSUPP) {
        // A file system without it.
        offset += await this.#sendCopied(file, offset, Math.min(end - offset, MAX_COLLECTED_BYTES));
      } else if (sent === -Errno.EIO) {
        throw new RepriseError("failed", "the server's disk failed while reading");
      } else if (sent !== -Errno.EINTR) {
        throw lost("the connection was cut while sending");
      }
    }
    if (this.#turnIsOver()) await nextTurn();
  }

  /** Reads and writes instead, waiting where the kernel takes nothing; returns how many bytes it took. */
  async #sendCopied(file: number, offset: number, length: number): Promise<number> {
    const bytes = new Uint8Array(length);
    const count = readSync(file, bytes, 0, length, offset);
    if (count === 0) throw new RepriseError("changed", "changed on the server: the file became shorter");
    const taken = this.#write(bytes.subarray(0, count));
    if (taken === 0) await this.#untilWritable();
    return taken;
  }

  /** Makes this and every later wait throw `error`: the peer went, the user gave up, the server stops. */
  fail(error: RepriseError): void {
    this.#failure ??= error;
    this.#readable.wake();
    this.#writable.wake();
  }

  /**
   * Reads and forgets whatever comes, for `ms`; false if the peer had said its last before. Nothing but an end can follow.
   * Never throws.
   */
  async ignore(ms: number): Promise<boolean> {
    const end = performance.now() + ms;
    this.#decoder.discard();
    do {
      this.#chunks = [];
      if (this.#ended || this.#failure) return false;
      this.#unpause();
    } while (await this.#readable.wait(end));
    return true;
  }

  /** Whether the peer is waited for, and has sent nothing for `ms`. */
  isQuiet(ms: number): boolean {
    return this.#readable.isWaiting && performance.now() - this.#readAt >= ms;
  }

  /** Ends in order: everything sent arrives, then both sides close. Never throws. */
  async finish(): Promise<void> {
    try {
      this.#failure = undefined;
      this.beforeWait = undefined;
      this.timeoutMs = Math.min(this.timeoutMs, FINISH_MS);
      await this.flush();
      this.#socket.shutdown();
      const deadline = setTimeout(() => this.fail(lost("the peer did not close")), FINISH_MS);
      try {
        while (!this.#ended && !this.#failure) {
          this.#chunks = [];
          await this.#untilReadable();
        }
      } finally {
        clearTimeout(deadline);
      }
    } catch (error) {
      // The peer went first, or does not read: nothing more can be said to it.
      if (!(error instanceof RepriseError)) throw error;
    }
    this.close();
  }

  /** Ends at once; what the peer has not yet read is lost. */
  close(): void {
    this.fail(lost("the connection is closed"));
    this.#ended = true;
    this.#chunks = [];
    this.#socket.terminate();
  }

  #atEnd(): undefined {
    if (this.#cut) throw this.#cut;
    if (!this.#decoder.atBoundary) throw lost("the connection was cut in mid-frame");
    return undefined;
  }

  async #untilReadable(startedAt = performance.now()): Promise<void> {
    await this.beforeWait?.();
    this.#sendCollected();
    if (this.#chunks.length > 0 || this.#ended || this.#failure) return;
    this.#unpause();
    const owes = this.owes || !this.#decoder.atBoundary;
    const base = this.owes ? () => startedAt : () => Math.max(startedAt, this.#wroteAt);
    await this.#wait(this.#readable, base, owes);
  }

  /** Not awaited: the peer may have to be read before it reads. One that never does fails the connection. */
  #sendCollected(): void {
    if (this.#collectedBytes > 0) this.flush().catch((error) => this.fail(error));
  }

  async #untilWritable(): Promise<void> {
    this.#checkWritable();
    const startedAt = performance.now();
    await this.#wait(this.#writable, () => Math.max(startedAt, this.#readAt), true);
    this.#checkWritable();
  }

  /** Until `timeoutMs` after `base()`, which moves on while the connection is alive in the other direction. */
  async #wait(waiter: Waiter, base: () => number, owes: boolean): Promise<void> {
    let aliveAt = 0;
    let moved = this.#moved();
    for (;;) {
      const startedAt = performance.now();
      const left = Math.max(base(), aliveAt) + this.timeoutMs - startedAt;
      // It may have taken something without there being room for more: a slow reader is not a silent one.
      if (left <= 0 && (waiter !== this.#writable || this.#moved() === moved)) throw this.#silence();
      if (left <= 0) {
        moved = this.#moved();
        aliveAt = startedAt;
        continue;
      }
      const woken = await waiter.wait(startedAt + (owes ? Math.min(left, this.timeoutMs - this.#waitedMs) : left));
      this.#turnAt = performance.now();
      if (owes) this.#judge(this.#turnAt - startedAt);
      else this.#forgive();
      if (woken) return;
    }
  }

  #silence(): RepriseError {
    return new RepriseError("timeout", `no byte for ${this.timeoutMs / 1000} s`);
  }

  /** The peer was waited for: so long a time as would end a silent one may not be filled with a byte now and then. */
  #judge(waitedMs: number): void {
    this.#waitedMs += waitedMs;
    if (this.#waitedMs < this.timeoutMs) return;
    const moved = this.#moved() - this.#movedBefore;
    const isSlow = moved * 1000 < (this.#minRate ?? 0) * this.#waitedMs;
    this.#forgive();
    if (!isSlow) return;
    throw new RepriseError("timeout", `fewer than ${this.#minRate} bytes a second for ${this.timeoutMs / 1000} s`);
  }

  /** What was is no longer held against the peer, nor for it. */
  #forgive(): void {
    this.#waitedMs = 0;
    this.#movedBefore = this.#moved();
  }

  /**
   * Bytes that came, and those that arrived: what the kernel takes to send can be minutes ahead of a slow reader, and is
   * taken in pieces of a megabyte.
   */
  #moved(): number {
    const isJudged = this.#minRate !== undefined && !this.#encrypted;
    const waiting = isJudged ? (libc()?.unacknowledged(this.#socket.fd) ?? 0) : 0;
    return this.#received + this.#written - Math.max(0, waiting);
  }

  #checkWritable(): void {
    if (this.#failure) throw this.#failure;
    if (this.#closed) throw this.#cut ?? lost("the connection is closed");
  }

  #pause(): void {
    if (this.#paused) return;
    this.#paused = true;
    this.#socket.pause();
  }

  #unpause(): void {
    if (!this.#paused) return;
    this.#paused = false;
    this.#socket.resume();
  }

  #write(bytes: Uint8Array): number {
    const taken = this.#socket.write(bytes);
    if (taken < 0) throw lost("the connection was cut while sending");
    this.#wrote(taken);
    return taken;
  }

  /** Takes what is due of a large frame from the kernel; false when nothing comes at once, or no such frame is due. */
  #receive(): boolean {
    const calls = this.#direct && (this.#streaming || this.#decoder.due >= MIN_DIRECT_BYTES) ? libc() : null;
    if (!calls) return false;
    const space = this.#decoder.space();
    const { fd } = this.#socket;
    let count = calls.receive(fd, space);
    // Handing the socket back to Bun for such a moment would have it read into new memory each time.
    const ms = this.#directWaitMs;
    if (count === -Errno.EAGAIN && ms > 0 && calls.waitReadable(fd, ms)) count = calls.receive(fd, space);
    if (count < 0) return false;
    // A paused socket is not read behind our back while we take turns.
    this.#pause();
    this.#decoder.filled(count);
    this.#took(count);
    if (count === 0) this.#ended = true;
    return true;
  }

  /** What has come before can still be read; with an `error` the stream then ends in it. */
  #onClose(error?: Error): void {
    this.#closed = true;
    this.#ended = true;
    if (error) this.#cut ??= lost("the connection was cut", error);
    this.#readable.wake();
    this.#writable.wake();
  }

  #took(count: number): void {
    this.#turn += count;
    this.#received += count;
    this.#readAt = performance.now();
  }

  #wrote(count: number): void {
    this.#turn += count;
    this.#written += count;
    if (count > 0) this.#wroteAt = performance.now();
  }

  #turnIsOver(): boolean {
    const now = performance.now();
    if (this.#turn < TURN_BYTES && now - this.#turnAt < TURN_MS) return false;
    this.#turn = 0;
    this.#turnAt = now;
    return true;
  }

  /** For Bun.listen and Bun.connect: one set of handlers, whose `this` is found in `socket.data`. */
  static readonly handlers = {
    data(socket, chunk) {
      const self = socket.data;
      // Of a server that could not wait for the handshake to be over: it is not trusted yet.
      if (!self) return void socket.terminate();
      self.#took(chunk.length);
      self.#chunks.push(chunk);
      if (!self.#readable.wake()) self.#pause();
    },
    drain(socket) {
      if (socket.data) socket.data.#writable.wake();
    },
    end(socket) {
      if (!socket.data) return;
      socket.data.#ended = true;
      socket.data.#readable.wake();
    },
    close(socket, error) {
      if (socket.data) socket.data.#onClose(error);
    },
    error(socket, error) {
      if (socket.data) socket.data.#onClose(error);
    },
  } satisfies SocketHandler<Connection>;
}

/** Bun.listen on TCP, with the option that its types do not know: several processes may share the port. */
export function listen<T>(options: TCPSocketListenOptions<T> & { reusePort?: boolean }): TCPSocketListener<T> {
  return Bun.listen(options);
}

/** What a server shows to prove who it is: PEM. */
export interface Certificate {
  cert: string;
  key: string;
}

export interface AcceptOptions extends ConnectionOptions {
  host: string;
  port: number;
  /** With TLS: asked for each connection. */
  certificate?: (() => Certificate) | undefined;
  onConnection: (connection: Connection) => void;
}

/** Small ones are put together; a large one behind them is not worth copying. */
function together(parts: Uint8Array[]): Uint8Array[] {
  if (parts.length === 1) return parts;
  const last = parts.at(-1)!;
  if (last.length < MIN_UNCOPIED_BYTES) return [Buffer.concat(parts)];
  return [Buffer.concat(parts.slice(0, -1)), last];
}

/** Listens on a port that other processes listen on as well. */
export function accept(options: AcceptOptions): TCPSocketListener<Connection> {
  const { host: hostname, port, certificate, onConnection } = options;
  const plain: SocketHandler<Connection> = {
    ...Connection.handlers,
    open: (socket) => onConnection(new Connection(socket, options)),
  };
  // Without `data`, which would be given everything once more as it travels.
  const tls: SocketHandler<Connection> = {
    drain() {},
    open: (socket) => onConnection(encrypt(socket, certificate!(), options)),
  };
  return listen<Connection>({ hostname, port, reusePort: true, socket: certificate ? tls : plain });
}

/** The connection waits in `next()` while the handshake goes on, and has no more time for it than for a frame. */
function encrypt(socket: BunSocket<Connection>, certificate: Certificate, options: AcceptOptions): Connection {
  const tls = { ...certificate, isServer: true, minVersion: LEAST_TLS };
  const [, encrypted] = socket.upgradeTLS<Connection>({
    isServer: true,
    tls,
    socket: {
      ...Connection.handlers,
      handshake(socket, done, error) {
        // One who only looks whether somebody listens has gone by now.
        const hasGone = (error as NodeJS.ErrnoException | null)?.code === "ECONNRESET";
        if (done) socket.data.isShaking = false;
        else socket.data.fail(new RepriseError(hasGone ? "lost" : "bad_frame", "no TLS was to be had", error));
      },
    },
  } as Parameters<typeof socket.upgradeTLS<Connection>>[0]);
  const connection = new Connection(encrypted, { ...options, encrypted: true });
  connection.isShaking = true;
  return connection;
}

export interface ConnectOptions extends ConnectionOptions {
  host: string;
  port: number;
  /** Speak TLS, and only with who has a certificate of this name. */
  tls?: boolean;
  /** Certificates, as PEM, of those whose word is taken for who a server is, in place of the usual ones. */
  ca?: string | undefined;
  signal?: AbortSignal | undefined;
}

/**
 * Connects over TCP, or TLS. Throws `lost`, saying why, within `timeoutMs`; `insecure` where no certificate that can be
 * trusted was shown; `signal`'s reason if it aborts.
 */
export async function connect(options: ConnectOptions): Promise<Connection> {
  const { host, port, tls = false, ca, timeoutMs, signal } = options;
  const where = formatAddress(host, port);
  signal?.throwIfAborted();
  const { promise, resolve, reject } = Promise.withResolvers<Connection>();
  let given = false;
  let opened: BunSocket<Connection> | undefined;
  const refuse = (error: unknown) => {
    given = true;
    reject(error);
    // Last, for this calls `close` below, which has less to say.
    opened?.terminate();
  };
  const timer = setTimeout(() => refuse(lost(`${where} does not answer for ${timeoutMs / 1000} s`)), timeoutMs);
  const abort = () => refuse(signal?.reason);
  signal?.addEventListener("abort", abort, { once: true });
  const settle = (socket: BunSocket<Connection>, wrong?: RepriseError) => {
    if (wrong) refuse(wrong);
    if (given) socket.terminate();
    else resolve(new Connection(socket, { ...options, encrypted: tls }));
  };
  const opening = {
    hostname: host,
    port,
    ...(tls && { tls: { ca, serverName: nameOf(host), rejectUnauthorized: false } }),
    socket: {
      ...Connection.handlers,
      open(socket) {
        opened = socket;
        if (!tls || given) settle(socket);
      },
      handshake(socket, done, error) {
        if (tls) settle(socket, done && !error && socket.authorized ? undefined : distrust(socket, options, error));
      },
      close(socket, error) {
        if (socket.data) return Connection.handlers.close(socket, error);
        refuse(lost(`${where}: closed in the middle of the TLS handshake`, error));
      },
    },
  } as Bun.TCPSocketConnectOptions<Connection>;
  try {
    Bun.connect(opening).catch((error) => refuse(lost(`${where}: ${reasonOf(error)}`, error)));
    return await promise;
  } catch (error) {
    throw isUseless(error) ? new RepriseError("usage", "--ca has a certificate that cannot be read", error) : error;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
}

/** Bun throws it at once: a certificate in `ca` is damaged. */
function isUseless(error: unknown): boolean {
  return !(error instanceof RepriseError) && (error as Error).message === "Invalid CA";
}

/** What TLS sends ahead as the name of the server: none for an address. */
function nameOf(host: string): string | undefined {
  return /^[\d.]+$|:/.test(host) ? undefined : host;
}

/** What is wrong with a server's certificate, and what can be done. */
function distrust(socket: BunSocket<Connection>, address: { host: string; port: number }, error: Error | null) {
  const where = formatAddress(address.host, address.port);
  const code = (error as NodeJS.ErrnoException | null)?.code ?? "";
  if (code === "ECONNRESET") return lost(`${where}: closed in the middle of the TLS handshake`, error);
  const why = code === "EPROTO" ? protocolProblem(error!, where) : UNTRUSTED[code]?.(certificateOf(socket));
  const problem = why ?? `no TLS to be trusted: ${error?.message ?? "no certificate"}`;
  return new RepriseError("insecure", `${where}: ${problem}`, error);
}

interface ShownCertificate {
  valid_from?: string;
  valid_to?: string;
  subjectaltname?: string;
}

function certificateOf(socket: BunSocket<Connection>): ShownCertificate {
  return (socket.getPeerCertificate() ?? {}) as ShownCertificate;
}

const SELF_SIGNED = "its certificate is signed by nobody but itself; name it with --ca FILE to trust it";
const UNKNOWN_ISSUER = "its certificate is of an issuer that is not known here; name the issuer's with --ca FILE";
const UNTRUSTED: Record<string, (shown: ShownCertificate) => string> = {
  DEPTH_ZERO_SELF_SIGNED_CERT: () => SELF_SIGNED,
  SELF_SIGNED_CERT_IN_CHAIN: () => UNKNOWN_ISSUER,
  UNABLE_TO_GET_ISSUER_CERT: () => UNKNOWN_ISSUER,
  UNABLE_TO_GET_ISSUER_CERT_LOCALLY: () => UNKNOWN_ISSUER,
  UNABLE_TO_VERIFY_LEAF_SIGNATURE: () => UNKNOWN_ISSUER,
  CERT_HAS_EXPIRED: ({ valid_to }) => `its certificate has expired (${valid_to}); the server needs a new one`,
  CERT_NOT_YET_VALID: ({ valid_from }) => `its certificate is not valid before ${valid_from}, by the clock here`,
  ERR_TLS_CERT_ALTNAME_INVALID: ({ subjectaltname = "no name" }) =>
    `its certificate is for ${quote(subjectaltname)}, not for the name used here`,
};

function protocolProblem({ message }: Error, where: string): string {
  if (/WRONG_VERSION_NUMBER|HTTP_REQUEST|INVALID_/.test(message)) return `no TLS is spoken there; use tcp://${where}`;
  return `no TLS that both speak: ${quote(message)}`;
}

/** `host:port`, with an IPv6 address in brackets. */
export function formatAddress(host: string, port: number): string {
  return host.includes(":") ? `[${host}]:${port}` : `${host}:${port}`;
}

/** An address to listen on that nobody can connect to: all that there are. */
export function isEverywhere(host: string): boolean {
  return /^[0.]+$|^[0:]+$/.test(host);
}

/** Whether an address, not a name, is this machine's own to itself. */
export function isLoopback(address: string): boolean {
  return /^(::ffff:)?127\.|^::1$/i.test(address);
}

const REASONS: Record<string, string> = {
  ECONNREFUSED: "nothing listens there",
  ENOTFOUND: "no such host",
  EHOSTUNREACH: "no route to that host",
  ENETUNREACH: "no route to that network",
  ETIMEDOUT: "no answer",
  ECONNRESET: "connection cut",
};

function reasonOf(error: { code?: string; message?: string }): string {
  return REASONS[error.code ?? ""] ?? error.message ?? String(error);
}

/** A pause that `signal` ends early, by throwing its reason. */
export function sleep(ms: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const abort = () => {
      clearTimeout(timer);
      reject(signal?.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", abort);
      resolve();
    }, ms);
    signal?.addEventListener("abort", abort, { once: true });
  });
}

/** Spreads bytes over time, for one direction of one connection. */
export class Pace {
  /** Bytes a second. */
  readonly rate: number;
  #dueAt = performance.now();

  constructor(rate: number) {
    this.rate = rate;
  }

  /** Returns once all bytes taken so far, these included, have had their time. */
  async take(bytes: number, signal?: AbortSignal): Promise<void> {
    const now = performance.now();
    this.#dueAt = Math.max(this.#dueAt, now) + (bytes / this.rate) * 1000;
    if (this.#dueAt - now >= 1) await sleep(this.#dueAt - now, signal);
  }
}

/** How large a chunk of content to send next: small at first, then as much as the connection takes in a short time. */
export class ChunkSize {
  readonly #most: number;
  readonly #least: number;
  bytes: number;

  constructor(most: number) {
    this.#most = most;
    this.#least = Math.min(FIRST_CHUNK_BYTES, most);
    this.bytes = this.#least;
  }

  /** The last chunk took so long. */
  took(ms: number): void {
    if (ms < SHORT_CHUNK_MS) this.bytes = Math.min(this.bytes * 2, this.#most);
    else if (ms > LONG_CHUNK_MS) this.bytes = Math.max(Math.floor(this.bytes / 2), this.#least);
  }
}

/** At most one party waits; whoever wakes it learns whether somebody did. */
class Waiter {
  /** One for whom a promise was made, or a connection at rest. */
  #waiting: ((inTime: boolean) => void) | Connection | undefined;
  /** When the wait is over, as performance.now() tells it. */
  dueAt = 0;

  /** Returns whether it was woken rather than that the time was over. */
  wait(dueAt: number): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    this.#wait(resolve, dueAt);
    return promise;
  }

  /** The same without a promise: calls `connection.wakeUp()`. */
  rest(connection: Connection, dueAt: number): void {
    this.#wait(connection, dueAt);
  }

  #wait(waiting: ((inTime: boolean) => void) | Connection, dueAt: number): void {
    if (this.#waiting) throw new Error("Two parties wait for the same thing");
    this.#waiting = waiting;
    this.dueAt = dueAt;
    alarm.add(this);
  }

  get isWaiting(): boolean {
    return this.#waiting !== undefined;
  }

  wake(inTime = true): boolean {
    const waiting = this.#waiting;
    if (!waiting) return false;
    this.#waiting = undefined;
    alarm.delete(this);
    if (typeof waiting === "function") waiting(inTime);
    else waiting.wakeUp(inTime);
    return true;
  }
}

/**
 * One timer for all that wait, set to the first of their ends. Thousands of clients idle, and a timer of its own costs
 * each of them more than the wait; a transfer waits thousands of times, and hardly ever until the end.
 */
class Alarm {
  readonly #waiting = new Set<Waiter>();
  #timer: NodeJS.Timeout | undefined;
  #at = Number.POSITIVE_INFINITY;

  add(waiter: Waiter): void {
    this.#waiting.add(waiter);
    if (waiter.dueAt < this.#at) this.#set(waiter.dueAt);
  }

  delete(waiter: Waiter): void {
    this.#waiting.delete(waiter);
  }

  /** It keeps no process alive: the sockets that are waited for do. */
  #set(at: number): void {
    clearTimeout(this.#timer);
    this.#at = at;
    this.#timer = setTimeout(() => this.#ring(), Math.max(0, at - performance.now())).unref();
  }

  #ring(): void {
    const now = performance.now();
    let next = Number.POSITIVE_INFINITY;
    // Who begins to wait meanwhile is still looked at, and sets no timer.
    this.#at = 0;
    try {
      for (const waiter of this.#waiting) {
        if (waiter.dueAt <= now) waiter.wake(false);
        else next = Math.min(next, waiter.dueAt);
      }
    } finally {
      this.#at = Number.POSITIVE_INFINITY;
      if (this.#waiting.size > 0) this.#set(Math.max(next === this.#at ? now : next, now + ALARM_STEP_MS));
    }
  }
}
const alarm = new Alarm();

function lost(what: string, cause?: unknown): RepriseError {
  return new RepriseError("lost", what, cause);
}

export function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/**
 * One connection to a server: requests go out, answers come in their order. What is said on it is said once; who wants
 * more than that of a server that may come and go has a `Remote`.
 */
import { type Connection, type ConnectOptions, connect, formatAddress, isLoopback, type Pace } from "./connection.ts";
import {
  type Answer,
  type BufferPool,
  DIRECT,
  decodeAnswer,
  ERRORS,
  type ErrorCode,
  encodeDataHeader,
  encodeEnd,
  encodeHello,
  encodeRequest,
  type Frame,
  HEADER_BYTES,
  type Meta,
  RepriseError,
  type Request,
  TAKES_FILE,
} from "./protocol.ts";
import type { Target } from "./resume.ts";

export interface Address {
  host: string;
  port: number;
  tls?: boolean;
}

/** [redirect] The server's REDIRECT in place of WELCOME: all is to be asked there. */
export class Redirected extends Error {
  readonly address: Address;
  /** That one is to answer itself. */
  readonly direct: boolean;
  constructor(address: Address, direct: boolean) {
    super(`redirected to ${formatAddress(address.host, address.port)}`);
    this.address = address;
    this.direct = direct;
  }
}

/** [redirect] And in place of an answer: this one thing is to be asked there. The connection goes on. */
export class SentOn extends Redirected {
  /** Whose answer it is. */
  readonly from: Address;
  constructor(from: Address, address: Address) {
    super(address, true);
    this.from = from;
  }
}

const MAX_REDIRECTS = 5;

/** From whom to whom one is sent: so many times at most, and to nobody twice. */
export class Route {
  readonly #code: ErrorCode;
  readonly #tls: boolean;
  readonly #seen: Set<string>;

  /** `code`: of what is wrong with more. */
  constructor(from: Address, code: ErrorCode) {
    this.#code = code;
    this.#tls = from.tls ?? false;
    this.#seen = new Set([nameOf(from)]);
  }

  /** Where to go next, by TLS if that is how it began. Throws `code`. */
  next({ host, port }: Address): Address {
    const address = { host, port, tls: this.#tls };
    const name = nameOf(address);
    if (this.#seen.has(name)) throw new RepriseError(this.#code, `redirects in a circle, last to ${name}`);
    if (this.#seen.size > MAX_REDIRECTS)
      throw new RepriseError(this.#code, `more than ${MAX_REDIRECTS} redirects, last to ${name}`);
    this.#seen.add(name);
    return address;
  }
}

export function nameOf({ host, port }: Address): string {
  return formatAddress(host, port);
}

export interface PeerOptions {
  /** The server is to answer itself. */
  direct?: boolean;
  token?: string | undefined;
  signal: AbortSignal;
  pool: BufferPool;
  pace: Pace | undefined;
}

/** What content is received into; `bytes` is the position that it has come to. */
export type Receiver = Pick<Target, "bytes" | "append">;

/** One connection to a server: requests go out, answers come in their order. HELLO travels with the first request. */
export class Peer {
  readonly #connection: Connection;
  readonly address: Address;
  readonly #options: PeerOptions;
  readonly #onAbort = () => this.#connection.fail(this.#options.signal.reason);
  #greeted = false;
  #peeked: Answer | undefined;
  /** An answer has come since the last call began, rather than the end of the connection. */
  answered = false;
  /** Content has come on this connection. */
  progress = false;

  static async open(options: PeerOptions & ConnectOptions): Promise<Peer> {
    const { host, port, tls = false, token = "", direct = false } = options;
    const connection = await connect(options);
    const address = formatAddress(host, port);
    if (connection.peer === "") throw new RepriseError("lost", `${address}: connection cut`);
    if (token !== "" && !tls && !isLoopback(connection.peer)) {
      connection.close();
      throw new RepriseError(
        "insecure",
        `${address}: no token is sent in clear to another machine; a server with --tls-cert is tls://${address}`,
      );
    }
    await connection.send(encodeHello({ flags: direct ? TAKES_FILE | DIRECT : TAKES_FILE, token }));
    return new Peer(connection, options, { host, port, tls });
  }

  private constructor(connection: Connection, options: PeerOptions, address: Address) {
    this.#connection = connection;
    this.address = address;
    this.#options = options;
    options.signal.addEventListener("abort", this.#onAbort, { once: true });
  }

  /** Gives back the memory of content that was received. */
  readonly #free = (content: Uint8Array): void => this.#options.pool.give(content);

  ask(request: Request): Promise<void> {
    return this.#connection.send(encodeRequest(request));
  }

  /** The same; undefined where there is nothing to wait for. */
  askNow(request: Request): Promise<void> | undefined {
    return this.#connection.collect(encodeRequest(request)) ? this.#connection.flush() : undefined;
  }

  /** The server has said WELCOME: it has seen what was asked, or will. */
  get isGreeted(): boolean {
    return this.#greeted;
  }

  /** The next answer, if it is here already; it is left to `expect`, unless `drop` is called. Throws as `expect`. */
  peekNow(): Answer | undefined {
    while (!this.#peeked && this.#greeted) {
      const frame = this.#ready();
      if (!frame) break;
      const answer = this.#decode(frame);
      if (answer.type !== "wait") this.#peeked = this.#accept(answer);
    }
    return this.#peeked;
  }

  #ready(): Frame | undefined {
    try {
      return this.#connection.ready();
    } catch (error) {
      return this.#explain(error);
    }
  }

  /** Whoever peeked has taken the answer. */
  drop(): void {
    this.#peeked = undefined;
  }

  /** `frame` has room for a header, then content, and may be used again on return. Returns the content's crc32. */
  async content(frame: Uint8Array): Promise<number> {
    const content = frame.subarray(HEADER_BYTES);
    const crc32 = Bun.hash.crc32(content);
    encodeDataHeader(content.length, crc32, frame);
    await this.#connection.send(frame);
    await this.#connection.flush();
    return crc32;
  }

  async end(count: number): Promise<void> {
    await this.#connection.send(encodeEnd(count));
    await this.#connection.flush();
  }

  flush(): Promise<void> {
    return this.#connection.flush();
  }

  set beforeWait(work: (() => Promise<void>) | undefined) {
    this.#connection.beforeWait = work;
  }

  async sums(id: string, path: string): Promise<{ length: number; crc32: number }[]> {
    await this.ask({ action: "sums", id, path });
    const sums: { length: number; crc32: number }[] = [];
    for (;;) {
      const answer = await this.expect("sum", "end");
      if (answer.type === "end") return sums;
      sums.push(answer);
    }
  }

  /** The next answer, which must be of one of these types. Throws what the server says is wrong. */
  async expect<T extends Answer["type"]>(...types: T[]): Promise<Extract<Answer, { type: T }>> {
    const answer = this.peekNow() ?? (await this.#answer());
    this.#peeked = undefined;
    if (!(types as string[]).includes(answer.type))
      throw unexpected(`${answer.type} in place of ${types.join(" or ")}`);
    return answer as Extract<Answer, { type: T }>;
  }

  /** The same of a GET or a STAT, the only ones that may be sent on: then this throws `SentOn`. */
  async expectHeld<T extends Answer["type"]>(...types: T[]): Promise<Extract<Answer, { type: T }>> {
    const answer = await this.expect<T | "redirect">(...types, "redirect");
    if (answer.type === "redirect") throw new SentOn(this.address, answer as Address);
    return answer as Extract<Answer, { type: T }>;
  }

  /** Receives content into `target` until END. */
  async receive(target: Receiver, size: number, progress?: (bytes: number) => void): Promise<void> {
    let { bytes } = target;
    const start = bytes;
    for (;;) {
      const answer = await this.expect("data", "end");
      if (answer.type === "end") {
        if (answer.count === bytes - start) return;
        throw unexpected(`the end after ${bytes - start} of ${answer.count} bytes`);
      }
      const { content, crc32 } = answer;
      bytes += content.length;
      if (bytes > size) throw unexpected("more content than announced");
      this.progress = true;
      await target.append(content, crc32, this.#free);
      progress?.(bytes);
      await this.pace(content.length);
    }
  }

  /** The same of content that came in one frame. */
  async receiveWhole(target: Receiver, content: Uint8Array, progress?: (bytes: number) => void): Promise<void> {
    this.progress = true;
    if (content.length > 0) await target.append(content, Bun.hash.crc32(content), this.#free);
    progress?.(content.length);
    await this.pace(content.length);
  }

  /** Receives content until END, and forgets it. */
  async skip(): Promise<void> {
    for (;;) {
      const answer = await this.expect("data", "end");
      if (answer.type === "end") return;
      this.#free(answer.content);
    }
  }

  /** At a limited rate: waits until so many further bytes are due. */
  pace(bytes: number): Promise<void> | undefined {
    return this.#options.pace?.take(bytes, this.#options.signal);
  }

  /** Waits for the next answer and leaves it to `expect`. */
  async peek(): Promise<void> {
    this.#peeked ??= await this.#answer();
  }

  async quit(): Promise<void> {
    try {
      await this.ask({ action: "quit" });
      await this.#connection.finish();
    } catch {
      // It has gone already, which is what was wanted.
    }
    this.close();
  }

  close(): void {
    this.#options.signal.removeEventListener("abort", this.#onAbort);
    this.#connection.close();
  }

  async #answer(): Promise<Answer> {
    if (!this.#greeted) {
      const welcome = await this.#read();
      if (welcome.type !== "welcome") throw unexpected(`${welcome.type} in place of welcome`);
      this.#greeted = true;
    }
    return this.#read();
  }

  async #read(): Promise<Answer> {
    for (;;) {
      const frame = await this.#connection.next().catch((error) => this.#explain(error));
      if (!frame) throw new RepriseError("lost", "the server closed the connection");
      const answer = this.#decode(frame);
      if (answer.type !== "wait") return this.#accept(answer);
    }
  }

  #decode(frame: Frame): Answer {
    try {
      return decodeAnswer(frame);
    } catch (error) {
      return this.#explain(error);
    }
  }

  /** A server that has said WELCOME speaks the protocol: what then can't be understood was damaged on the way. */
  #explain(error: unknown): never {
    const code = error instanceof RepriseError ? error.code : undefined;
    if (this.#greeted && (code === "bad_frame" || code === "speaks_tls"))
      throw new RepriseError("checksum", undefined, error);
    if (code !== "speaks_tls") throw error;
    const address = nameOf(this.address);
    throw new RepriseError("insecure", `${address}: TLS is spoken there; use tls://${address}`, error);
  }

  #accept(answer: Answer): Answer {
    const isLast = answer.type === "error" && ERRORS[answer.error.code].closes;
    if (!isLast) this.answered = true;
    if (answer.type === "error") throw answer.error;
    // [redirect] Behind WELCOME it is an answer like others, which only some requests can have.
    if (answer.type !== "redirect" || this.#greeted) return answer;
    if (this.#options.direct) throw unexpected("a redirect where it was to answer itself");
    throw new Redirected(answer, answer.direct);
  }
}

/** What the answer to a GET must begin with. Throws where it is not a file's content from there on, of that version. */
export function checkMeta(meta: Meta, offset: number, asked: { offset: number; etag: string }): void {
  if (meta.kind !== "file" || meta.etag === "") throw unexpected("a file without a version");
  const isAsked = offset === asked.offset && (asked.etag === "" || meta.etag === asked.etag);
  if (!isAsked) throw unexpected("another part than was asked for");
}

export function unexpected(what: string): RepriseError {
  return new RepriseError("bad_frame", `the server does not keep to the protocol: ${what}`);
}

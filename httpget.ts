/**
 * GET over plain HTTP/1.1 of so many bytes as are known beforehand, received straight into their place.
 *
 * `fetch` receives into memory of its own and puts together what came in more of it, each page fresh from the kernel: for
 * a GiB that took 1.5 s of a processor, where this takes 0.6. What Bun has read from the socket is copied to its place,
 * and what came meanwhile is received there by recv(2); without the C library, all is copied.
 *
 * Of answers only the one is understood that there ought to be: 206, with just as many bytes. At any other the connection
 * ends, and it is asked for again by `fetch`, which knows of all the rest: errors and their words, chunks, redirections.
 */
import type { Socket as BunSocket, SocketHandler } from "bun";
import { libc } from "./libc.ts";

/** An answer's head, which is some lines. */
const MAX_HEAD_BYTES = 16 * 1024;
/** Connections that nobody uses are kept for the next, so many and so long. */
const MAX_IDLE = 4;
const IDLE_SECONDS = 10;
const NOTHING = Buffer.alloc(0);

/** Bun's sockets have their descriptor, its types do not say so. */
type Socket<T> = BunSocket<T> & { readonly fd: number };

/** Connections to one server. */
export class HttpGetter {
  readonly #hostname: string;
  readonly #port: number;
  readonly #idle = new Set<Line>();
  /** It speaks as only `fetch` understands. */
  #isStrange = false;

  constructor({ hostname, port }: URL) {
    this.#hostname = hostname;
    this.#port = Number(port) || 80;
  }

  /** Undefined for what has to go another way: TLS, and whatever a proxy is for. */
  static for(url: URL, env: Record<string, string | undefined> = process.env): HttpGetter | undefined {
    const isDirect = url.protocol === "http:" && !env.http_proxy && !env.HTTP_PROXY;
    return isDirect ? new HttpGetter(url) : undefined;
  }

  /**
   * Fills `place`, which nobody else may use until then. Returns the answer's headers, or undefined where `fetch` has to
   * ask; throws what cut the connection, or the reason of `signal`.
   */
  async get(
    path: string,
    headers: Record<string, string>,
    place: Uint8Array,
    signal: AbortSignal,
  ): Promise<Headers | undefined> {
    const request = requestOf(path, headers);
    if (this.#isStrange || request === undefined) return undefined;
    signal.throwIfAborted();
    const { promise: aborted, reject } = Promise.withResolvers<never>();
    aborted.catch(() => {});
    const onAbort = () => reject(signal.reason);
    signal.addEventListener("abort", onAbort, { once: true });
    let line: Line | undefined;
    try {
      line = this.#kept() ?? (await this.#open(aborted));
      const answer = await Promise.race([line.ask(request, place), aborted]);
      this.#isStrange ||= answer === "strange";
      return typeof answer === "string" ? undefined : answer;
    } finally {
      signal.removeEventListener("abort", onAbort);
      // Nothing comes into `place` any more, whatever has happened.
      if (line?.isIdle && this.#idle.size < MAX_IDLE) this.#keep(line);
      else line?.close();
    }
  }

  async #open(aborted: Promise<never>): Promise<Line> {
    const opening = Line.to(this.#hostname, this.#port);
    try {
      return await Promise.race([opening, aborted]);
    } catch (error) {
      opening.then(
        (late) => late.close(),
        () => {},
      );
      throw error;
    }
  }

  #kept(): Line | undefined {
    for (const line of this.#idle) {
      this.#idle.delete(line);
      line.wake();
      return line;
    }
    return undefined;
  }

  #keep(line: Line): void {
    this.#idle.add(line);
    line.rest(() => this.#idle.delete(line));
  }
}

/** "refused" is an answer of another status or length; "strange", one of success that is not understood. */
type Answer = Headers | "refused" | "strange";

/** A connection, with one question at a time. */
class Line {
  readonly #socket: Socket<Line>;
  /** What has come of an answer's head. */
  #head: Buffer = NOTHING;
  #headers: Headers | undefined;
  #place: Uint8Array = NOTHING;
  #have = 0;
  #asked: PromiseWithResolvers<Answer> | undefined;
  #isClosed = false;
  /** Told of the end of a rest that nobody has asked for. */
  #onClose: (() => void) | undefined;

  constructor(socket: BunSocket<Line>) {
    this.#socket = socket as Socket<Line>;
    socket.data = this;
  }

  static async to(hostname: string, port: number): Promise<Line> {
    const { promise, resolve } = Promise.withResolvers<Line>();
    const open = (socket: BunSocket<Line>) => resolve(new Line(socket));
    await Bun.connect<Line>({ hostname, port, socket: { ...Line.handlers, open } });
    return promise;
  }

  /** It could be asked again. */
  get isIdle(): boolean {
    return !this.#isClosed && !this.#asked;
  }

  rest(onClose: () => void): void {
    this.#onClose = onClose;
    this.#socket.timeout(IDLE_SECONDS);
    this.#socket.unref();
  }

  wake(): void {
    this.#onClose = undefined;
    this.#socket.timeout(0);
    this.#socket.ref();
  }

  ask(request: string, place: Uint8Array): Promise<Answer> {
    this.#asked = Promise.withResolvers<Answer>();
    const { promise } = this.#asked;
    promise.catch(() => {});
    this.#place = place;
    this.#have = 0;
    // There is room for it where nothing is under way.
    if (this.#socket.write(request) < request.length) this.#end();
    return promise;
  }

  close(): void {
    this.#end();
    this.#socket.terminate();
  }

  #end(error?: Error): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#place = NOTHING;
    this.#asked?.reject(error ?? new Error("the connection was cut"));
    this.#onClose?.();
  }

  #took(chunk: Buffer): void {
    if (!this.#asked || this.#isClosed) {
      // Nobody has asked for it.
      this.close();
      return;
    }
    const content = this.#headers ? chunk : this.#pastHead(chunk);
    if (content) this.#fill(content);
  }

  /** What is behind the head, once that is whole and understood. */
  #pastHead(chunk: Buffer): Buffer | undefined {
    this.#head = this.#head.length === 0 ? chunk : Buffer.concat([this.#head, chunk]);
    const end = this.#head.indexOf("\r\n\r\n");
    if (end < 0 && this.#head.length <= MAX_HEAD_BYTES) return undefined;
    const answer = end < 0 ? "strange" : answerOf(this.#head.toString("latin1", 0, end), this.#place.length);
    const rest = this.#head.subarray(end + 4);
    this.#head = NOTHING;
    if (typeof answer === "string") {
      this.#answer(answer, false);
      return undefined;
    }
    this.#headers = answer;
    return rest;
  }

  #fill(content: Buffer): void {
    const fitting = content.subarray(0, this.#place.length - this.#have);
    this.#place.set(fitting, this.#have);
    this.#have += fitting.length;
    this.#receive();
    if (this.#have === this.#place.length) this.#answer(this.#headers!, fitting.length === content.length);
  }

  /** What has come since, without waiting. */
  #receive(): void {
    const calls = this.#have < this.#place.length ? libc() : null;
    while (calls && this.#have < this.#place.length) {
      const count = calls.receive(this.#socket.fd, this.#place.subarray(this.#have));
      // An end, or an error: Bun is told of it, too.
      if (count <= 0) return;
      this.#have += count;
    }
  }

  #answer(answer: Answer, isInOrder: boolean): void {
    const { resolve } = this.#asked!;
    const isLast = typeof answer !== "string" && /\bclose\b/i.test(answer.get("connection") ?? "");
    this.#asked = this.#headers = undefined;
    this.#place = NOTHING;
    if (!isInOrder || isLast) this.close();
    resolve(answer);
  }

  static readonly handlers = {
    data(socket, chunk) {
      socket.data.#took(chunk);
    },
    end(socket) {
      socket.data.close();
    },
    close(socket, error) {
      if (socket.data) socket.data.#end(error);
    },
    error(socket, error) {
      if (socket.data) socket.data.#end(error);
    },
    timeout(socket) {
      socket.data.close();
    },
  } satisfies SocketHandler<Line>;
}

/** Undefined for what cannot stand there as it is. */
function requestOf(path: string, headers: Record<string, string>): string | undefined {
  const lines = [`GET ${path} HTTP/1.1`, ...Object.entries(headers).map(([name, value]) => `${name}: ${value}`)];
  if (lines.some((line) => !/^[ -~]+$/.test(line))) return undefined;
  return `${lines.join("\r\n")}\r\n\r\n`;
}

/** By the head of an answer, of which `length` bytes of content are expected. */
function answerOf(head: string, length: number): Answer {
  const [first = "", ...lines] = head.split("\r\n");
  const [, status] = /^HTTP\/1\.1 (\d{3})(?: |$)/.exec(first) ?? [];
  if (status !== "206") return status === undefined || status.startsWith("2") ? "strange" : "refused";
  const headers = new Headers();
  for (const line of lines) {
    const [, name, value = ""] = /^([!#-'*+.^-z|~0-9A-Z-]+):[ \t]*([\t -~\x80-\xff]*)$/.exec(line) ?? [];
    if (name === undefined) return "strange";
    headers.append(name, value);
  }
  // Of two that are given both are there, which is no number.
  const said = headers.get("content-length") ?? "";
  if (!/^\d+$/.test(said) || headers.has("transfer-encoding")) return "strange";
  return said === String(length) ? headers : "refused";
}

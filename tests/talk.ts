/** A connection to a real server on which a test asks what it wants, one request after the other. */
import { Peer } from "../peer.ts";
import {
  BufferPool,
  type Entry,
  HEADER_BYTES,
  MAX_CONTENT_BYTES,
  type Meta,
  type Put,
  type Request,
  TO_THE_END,
  UNKNOWN_SIZE,
} from "../protocol.ts";

const PATIENCE_MS = 60_000;

export type PutOptions = Partial<Pick<Put, "id" | "offset" | "size" | "mtime" | "noClobber" | "parents" | "etag">>;

export class Talk implements Disposable {
  readonly peer: Peer;

  static async to(port: number, token?: string): Promise<Talk> {
    const options = { host: "127.0.0.1", port, maxLength: MAX_CONTENT_BYTES, timeoutMs: PATIENCE_MS, token };
    const { signal } = new AbortController();
    return new Talk(
      await Peer.open({ ...options, signal, pool: new BufferPool(2 * MAX_CONTENT_BYTES), pace: undefined }),
    );
  }

  constructor(peer: Peer) {
    this.peer = peer;
  }

  /** All methods throw what the server says is wrong. */
  async stat(path: string): Promise<Meta> {
    await this.peer.ask({ action: "stat", path });
    return metaOf(await this.peer.expect("meta"));
  }

  async get(
    path: string,
    { offset = 0, length = TO_THE_END, etag = "" } = {},
  ): Promise<{ meta: Meta; content: Buffer }> {
    await this.peer.ask({ action: "get", path, offset, length, etag });
    const answer = await this.peer.expect("meta", "file");
    if (answer.type === "file") return { meta: metaOf(answer), content: Buffer.from(answer.content) };
    const chunks: Uint8Array[] = [];
    for (;;) {
      const next = await this.peer.expect("data", "end");
      if (next.type === "end") return { meta: metaOf(answer), content: Buffer.concat(chunks) };
      chunks.push(Buffer.from(next.content));
    }
  }

  async list(path = "", recursive = true): Promise<Entry[]> {
    await this.peer.ask({ action: "list", path, recursive });
    const entries: Entry[] = [];
    for (;;) {
      const next = await this.peer.expect("entries", "end");
      if (next.type === "end") return entries;
      entries.push(...next.entries);
    }
  }

  /** Sorted, folders with a "/" behind them. */
  async names(path = "", recursive = true): Promise<string[]> {
    const entries = await this.list(path, recursive);
    return entries.map(({ kind, path }) => (kind === "folder" ? `${path}/` : path)).sort();
  }

  /** In DATA frames; `whole`: in the same frame. */
  async put(path: string, content: Uint8Array | string, options: PutOptions & { whole?: boolean } = {}): Promise<Meta> {
    const { whole = false, ...fields } = options;
    const bytes = Buffer.from(content);
    const put = putOf(path, { size: bytes.length + (fields.offset ?? 0), ...fields });
    await this.peer.ask(whole ? { ...put, content: bytes } : put);
    if (!whole) {
      await this.send(bytes);
      await this.peer.end(bytes.length);
    }
    return metaOf(await this.peer.expect("meta"));
  }

  /** The beginning of an upload that goes no further: returns when all is sent. */
  async begin(path: string, content: Uint8Array, options: PutOptions): Promise<void> {
    await this.peer.ask(putOf(path, options));
    await this.send(content);
  }

  async send(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length; at += MAX_CONTENT_BYTES) {
      const piece = bytes.subarray(at, at + MAX_CONTENT_BYTES);
      const frame = new Uint8Array(HEADER_BYTES + piece.length);
      frame.set(piece, HEADER_BYTES);
      await this.peer.content(frame);
    }
  }

  async change(request: Extract<Request, { action: "remove" | "move" | "mkdir" }>): Promise<void> {
    await this.peer.ask(request);
    await this.peer.expect("end");
  }

  remove(path: string, recursive = false): Promise<void> {
    return this.change({ action: "remove", path, recursive });
  }

  move(path: string, to: string, overwrite = false): Promise<void> {
    return this.change({ action: "move", path, to, overwrite });
  }

  mkdir(path: string, parents = false): Promise<void> {
    return this.change({ action: "mkdir", path, parents });
  }

  async status(): Promise<Record<string, unknown>> {
    await this.peer.ask({ action: "status" });
    return (await this.peer.expect("info")).info;
  }

  [Symbol.dispose](): void {
    this.peer.close();
  }
}

export function putOf(path: string, options: PutOptions): Put {
  const { id = "", offset = 0, size = UNKNOWN_SIZE, mtime = 0 } = options;
  const { noClobber = false, parents = false, etag = "" } = options;
  return { action: "put", path, id, offset, size, mtime, noClobber, parents, etag };
}

function metaOf({ kind, size, mtime, etag }: Meta): Meta {
  return { kind, size, mtime, etag };
}

/** `ok`, or the code of the error. */
export async function codeOf(promise: Promise<unknown>): Promise<string> {
  return promise.then(
    () => "ok",
    (error) => error.code ?? String(error),
  );
}

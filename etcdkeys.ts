/** What a cluster keeps in etcd: where, and how each of it is read. What it is for is said in etcdledger.ts. */
import { decodedText, type KeyValue, type Operation, put } from "./etcd.ts";
import type { Member, Record } from "./ledger.ts";
import { splitPath } from "./protocol.ts";
import { isHidden } from "./storage.ts";

export class Keys {
  readonly all: string;
  readonly ledger: string;
  readonly secret: string;
  readonly pruned: string;
  readonly records: string;
  readonly gone: string;
  readonly members: string;
  readonly seen: string;

  constructor(name: string) {
    this.all = `/reprise/${name}/`;
    this.ledger = `${this.all}ledger`;
    this.secret = `${this.all}secret`;
    this.pruned = `${this.all}pruned`;
    this.records = `${this.all}records/`;
    this.gone = `${this.all}gone/`;
    this.members = `${this.all}members/`;
    this.seen = `${this.all}seen/`;
  }

  readonly recordOf = (path: string): string => this.records + path;
  readonly goneOf = (path: string): string => this.gone + path;
  readonly memberOf = (node: string): string => this.members + node;
  readonly seenOf = (node: string): string => this.seen + node;
}

/** Undefined where it is not UTF-8. */
export function keyIn({ key }: KeyValue): string | undefined {
  try {
    return decodedText(key);
  } catch {
    return undefined;
  }
}

/** The first key that may come behind it. */
export function behind({ key }: KeyValue): string {
  return Buffer.concat([Buffer.from(key, "base64"), Buffer.of(0)]).toString("base64");
}

export function textOf({ value = "" }: KeyValue): string {
  return Buffer.from(value, "base64").toString();
}

export function revisionOf(kv: KeyValue | undefined): number {
  return Number(kv?.mod_revision ?? 0);
}

/** Written as text; 0 where there is none. */
export function countIn(kv: KeyValue | undefined): number {
  const count = kv ? Number(textOf(kv)) : 0;
  return isCount(count) ? count : 0;
}

export function objectIn(kv: KeyValue): { [name: string]: unknown } | undefined {
  try {
    const value = JSON.parse(textOf(kv));
    return typeof value === "object" && value !== null ? value : undefined;
  } catch {
    return undefined;
  }
}

export function seenPut(keys: Keys, { node, address, revision }: Member, seen: number): Operation {
  return put(keys.seenOf(node), JSON.stringify({ address, revision, seen }));
}

// ---------------------------------------------------------------------------------------------------- records

/** A record, and where it comes among those of its revision. */
export interface Placed {
  record: Record;
  at: number;
}

export function placedOf(keys: Keys, kv: KeyValue): Placed | undefined {
  const path = keyIn(kv)?.slice(keys.records.length) ?? "";
  const said = objectIn(kv);
  if (!isPath(path) || !said) return undefined;
  const { kind, size, mtime, sha256, origin, over, at } = said as unknown as Record & { at: unknown };
  const isDigest = typeof sha256 === "string" && (kind === "file" ? /^[0-9a-f]{64}$/.test(sha256) : sha256 === "");
  if (!["file", "folder", "gone"].includes(kind) || !isDigest || !isCount(size) || !Number.isSafeInteger(mtime))
    return undefined;
  if (typeof origin !== "string" || typeof over !== "string") return undefined;
  const record = { path, revision: revisionOf(kv), kind, size, mtime, sha256, origin, over };
  return { record, at: isCount(at) ? at : 0 };
}

export function inOrder(placed: Placed[]): Record[] {
  return placed.sort((a, b) => a.record.revision - b.record.revision || a.at - b.at).map(({ record }) => record);
}

function isPath(path: string): boolean {
  try {
    return path !== "" && !splitPath(path).some(isHidden);
  } catch {
    return false;
  }
}

export function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
